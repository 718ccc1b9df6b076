"""Random streams, events, progress, trackers and processes."""
