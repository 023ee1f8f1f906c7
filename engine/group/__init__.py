"""One replica group over several ranks: its coordinator, the ranks' processes, and the messages between them."""
