"""Learning a decoder and its prior."""
