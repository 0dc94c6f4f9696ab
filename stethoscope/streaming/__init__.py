"""Warnings while the model writes: what decoding steps leave behind, scored as it comes."""

from stethoscope.streaming.stream import StreamedAnswer, StreamedToken, WarningStreamer, stream

__all__ = ["StreamedAnswer", "StreamedToken", "WarningStreamer", "stream"]
