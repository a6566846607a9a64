"""Pictures that commands draw at their end, where matplotlib is installed."""


def headless_pyplot():
    """matplotlib's pyplot, which draws into files and opens no window; None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
