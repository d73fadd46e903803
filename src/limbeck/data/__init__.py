"""Text in, token windows out, in an order that can be resumed at any sample."""
