"""Warn about hallucinations while a model generates, from what its decoding steps leave behind."""

from stethoscope.streaming.stream import StreamedAnswer, StreamedToken, WarningStreamer, stream

__all__ = ["StreamedAnswer", "StreamedToken", "WarningStreamer", "stream"]
