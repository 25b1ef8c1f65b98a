"""The error of an image that gives no pixels."""


class UndecodableImage(ValueError):  # noqa: N818 - it says what the image is, not what we did
    """This image gives no pixels; `reason` is short, for the quarantine."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason
