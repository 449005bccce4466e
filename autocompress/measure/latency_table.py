class LatencyTable:
    pass
