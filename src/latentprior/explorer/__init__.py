"""A local page for a saved prior or model: sample by stage, walk along the prior, score, tilt."""
