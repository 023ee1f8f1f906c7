"""One Serve replica: the coordinator of one replica group."""
