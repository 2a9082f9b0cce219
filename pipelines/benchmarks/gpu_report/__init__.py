"""One run that measures FLUX.1 + Redux on a GPU: ``make gpu-report``.

At full size, with random weights made on the device, through the real pipeline. Needs no network,
no weights and nothing of this project installed. ``stages`` lists what is measured, most important
first; ``runner`` keeps to the time; ``report`` writes the JSON after each stage.
"""
