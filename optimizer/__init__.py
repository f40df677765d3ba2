"""The machine: captures a model, applies the passes it is given, verifies, measures, reports."""
