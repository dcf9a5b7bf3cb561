"""`entropy-rl inspect`: which tokens of a model's completions are forks, as one self-contained page.

completions.py reads or samples the completions, measure.py runs the model over them, page.py writes the page,
whose parts page.html, page.css and page.js lie beside it.
"""
