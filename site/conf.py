"""Settings of the static site; site/make.py gathers its pages and builds it. Nothing on a page asks a network."""

project = "rlhf_edu"
html_title = "RLHF, DPO and SimPO on a laptop"
extensions = ["myst_nb", "sphinxcontrib.katex"]
html_theme = "furo"
html_static_path, html_css_files, html_favicon = ["static"], ["course.css"], "static/favicon.svg"
html_show_search_summary = False  # it would be fetched, which a page opened from a disk may not do
html_copy_source = html_show_sourcelink = html_show_sphinx = html_show_copyright = False

nb_execution_mode = "off"  # the outputs are those that are committed
nb_ipywidgets_js = {}  # widgets need a kernel; their scripts would come from a network
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist", "html_image"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header", "myst.xref_missing", "mystnb.unknown_mime_type"]

katex_css_path = "katex-math.css"  # it comes with the extension, as KaTeX itself does
katex_options = 'output: "mathml"'  # the browser's own fonts: no web font is fetched


def setup(app):
    app.add_js_file("mathml.js", priority=900)
    app.add_js_file(
        None, body="document.addEventListener('DOMContentLoaded', () => repairMath(document));", priority=901
    )  # after KaTeX, which listens for the same
