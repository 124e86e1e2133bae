"""`videoadapt bench`: our parts beside what people would use instead, on the same input, on this machine."""
