"""`videoadapt serve`: a local page that shows how a run's model answers a video, and why at this point.

`server` starts and ends it, `app` is what it answers over HTTP, `queue` reads videos and runs the model, `answer` makes
the HTML of an answer. The look and the few lines of JavaScript are in page.html, page.css and page.js.
"""
