"""Video over one WebSocket while it is generated: sessions, protocol, encoding, files."""
