def description(version):
    return {}
