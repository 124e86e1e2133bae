"""data/clips"""
