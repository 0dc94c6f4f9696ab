"""Warn about hallucinations while a model generates, from what its decoding steps leave behind."""

from stethoscope.streaming.events import Final, MentionCompleted, StreamEvent, TakenBack, Token
from stethoscope.streaming.stream import stream
from stethoscope.streaming.warning_streamer import WarningStreamer

__all__ = ["Final", "MentionCompleted", "StreamEvent", "TakenBack", "Token", "WarningStreamer", "stream"]
