"""The TimeSformer of many operating points.

Shape letters, used in every comment of this package: B clips, C colours, T frames, H x W pixels, L tokens per side (the
length), N = L * L patch tokens per frame, P prefix tokens (the class token, and for students the distillation token),
K patches that are kept, D width, S sequences that attend within themselves, M heads.
"""
