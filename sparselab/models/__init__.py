"""All that knows `transformers`: opening models, and taking them apart at their decoder blocks."""

from sparselab.models.blocks import Decoder
from sparselab.models.loading import load, quiet, stream, stream_weights

__all__ = ["Decoder", "load", "quiet", "stream", "stream_weights"]
