"""The project's own tfds builders, one module each. To add one, write its module and import it in `register`."""


def register() -> None:
    """Import every builder, which registers it with tfds."""
    from components.datasets import synthetic_garments as synthetic_garments
