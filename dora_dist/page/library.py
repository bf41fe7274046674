"""The library that draws the charts of a page: BokehJS, from the package bokeh."""


def chart_library() -> str:
    """The scripts that a page takes in, 1.4 MB, with their licence (BSD-3-Clause) as a comment in each.

    Raises:
        ValueError: bokeh is not installed, or not whole.
    """
    try:
        from bokeh.resources import Resources  # imported here: a program that writes no page does not need it
    except ImportError as error:
        raise ValueError(
            f"bokeh draws the charts of a page, but cannot be imported ({error}): pip install bokeh, or omit --html"
        ) from error
    return "\n".join(
        Resources(mode="inline", minified=True, components=["bokeh", "bokeh-api"], log_level="warn").js_raw
    )
