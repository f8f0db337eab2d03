// The shared library of the operators needs one file of its own; everything else comes from the room.
