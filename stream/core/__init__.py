"""One pure function: event bytes, then history, then vector, then record bytes. No client, no clock, no environment."""
