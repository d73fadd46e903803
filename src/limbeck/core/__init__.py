"""What every other room stands on: types that cross borders, errors, files, and the facts of the machine."""
