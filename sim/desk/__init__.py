"""The desk: knows people and statistics. Frames, summaries, figures, reports; it uses the twin, never the reverse."""
