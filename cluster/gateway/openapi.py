def description(version): return {}
