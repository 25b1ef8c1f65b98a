"""Source image -> uint8 pixels, or UndecodableImage with the reason. Registered models import `decode` from here."""

from data_shards.decode.image import MAX_PIXELS, decode, stored, stored_bytes
from data_shards.decode.undecodable import UndecodableImage

__all__ = ["MAX_PIXELS", "UndecodableImage", "decode", "stored", "stored_bytes"]
