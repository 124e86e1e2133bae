"""data/video"""
