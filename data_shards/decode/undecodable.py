"""The error for an image that cannot be decoded.

Its reasons are stored in the manifest of a dataset: rewording one changes the version of datasets with such an image.
"""


class UndecodableImage(ValueError):  # noqa: N818 - the name describes the image
    """The image cannot be decoded; `reason` is short, for the quarantine."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason
