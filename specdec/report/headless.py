"""Pictures that commands draw at their end, where matplotlib is installed."""

NOT_DRAWN = "matplotlib is not installed, so nothing was drawn (pip install 'specdec-lab[demo]')"


def headless_pyplot():
    """matplotlib's pyplot, which draws into files and opens no window; None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
