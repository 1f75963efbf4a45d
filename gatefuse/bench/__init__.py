"""`gatefuse bench`: measurements, one module for each question, and the marks they must reach.

core (device time of the gate alone and in a layer's glue), cpu (the same on the CPU), blocks (real
layers of transformers), host (host and compile time), launch_rule (the kernel's launches) and peer
(the op beside the best known kernel) measure; results, marks, report, documents and plots read what
they wrote.
"""
