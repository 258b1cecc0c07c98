"""The gate explorer: choose a model and a picture, move the threshold or the budget, paint regions, and watch.

    from msvit.explorer import Explorer
    Explorer(model="scenes")

It works in JupyterLab and as a Voila page. `models` and `sources` (with `uploads`) are the models and the pictures that
it can show, `state` is what a model computes on a picture; `panels` (with `drawing`) and `export` draw that; `widgets`,
`painter.js` and `page` are the page.
"""

from .page import Explorer

__all__ = ["Explorer"]
