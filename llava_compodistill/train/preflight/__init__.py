"""`llava-compodistill check`: what training would stumble over, said before a machine is booked. No weights are read.

What is checked is checked by the functions that training calls: `records` and `mix` read the files, `data` reads the
samples, `rehearsal` asks the method about the pair. `findings` is the common form of what they say.
"""
