"""The project's own tfds builders, one module each; importing this package registers all of them with tfds.

To add one, write its module and import it here.
"""

from components.datasets import synthetic_garments as synthetic_garments
