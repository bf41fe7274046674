"""The library that draws a page's charts: BokehJS, from the package bokeh."""


def chart_library() -> str:
    """The library's scripts for inclusion in a page, 1.4 MB, each with its licence (BSD-3-Clause) as a comment.

    Raises:
        ValueError: bokeh is not installed, or incomplete.
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
