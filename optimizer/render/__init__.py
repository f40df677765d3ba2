"""Report → text: terminal, JSON, HTML."""
