"""The HTML reports that steps write, and the figures in them."""
