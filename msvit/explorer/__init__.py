"""The gate explorer: choose a model and a picture, move the threshold or the budget, paint regions, and watch.

    from msvit.explorer import Explorer
    Explorer(model="demo")

It works in JupyterLab and as a Voila page. `gallery` and `sources` are the models and the pictures that it can show,
`view` is what a model makes of a picture; `panels` (with `segpanels` and `drawing`) and `sheet` draw that; `rows` and
`page` are the widgets.
"""

from .page import Explorer

__all__ = ["Explorer"]
