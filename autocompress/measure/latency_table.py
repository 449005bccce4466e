class LatencyTable:
    pass


def read_table(path): ...
