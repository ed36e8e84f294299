"""The one error that a person sees when a model cannot be served."""


class ModelError(Exception):
    """A model cannot be found, fetched, read or served. The message says why and what to do."""
