"""What result files of benchmarks hold beside figures."""


def one_line(error: Exception) -> str:
    """Its type and the beginning of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
