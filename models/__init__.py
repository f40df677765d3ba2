"""The naive models of the five stories, each beside its hand-optimised form; plain torch."""
