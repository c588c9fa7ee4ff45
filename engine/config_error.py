"""What is wrong with a setting or a checkpoint."""


class ConfigError(ValueError):
    """A setting or a checkpoint that cannot be served; the text names it and the way out."""
