"""Warn about hallucinations while a model generates, from what its decoding steps leave behind."""

from stethoscope.streaming.events import Final, MentionCompleted, StreamEvent, Token
from stethoscope.streaming.stream import WarningStreamer, stream

__all__ = ["Final", "MentionCompleted", "StreamEvent", "Token", "WarningStreamer", "stream"]
