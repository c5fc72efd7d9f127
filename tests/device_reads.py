READS: dict = {}
OBJECTS: dict = {}
