"""`videoadapt bench`: four benchmarks, a module each.

Read first: `points.py`.

    points      the points of a model, beside their MACs
    model       the model beside other implementations of it (peers)
    attention   the kernels of attention
    data        our loaders beside other libraries' (loaders) on generated videos (files); memory, peak
    results     what the results of all have in common
"""
