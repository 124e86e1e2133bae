"""data/index"""
