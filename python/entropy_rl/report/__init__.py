"""`entropy-rl inspect`: shows which tokens of a model's completions are forks, on one self-contained page.

completions.py reads or samples the completions and measure.py runs the model over them; or rollouts.py reads the
responses of a training run. page.py writes the page from page.html, page.css and page.js.
"""
