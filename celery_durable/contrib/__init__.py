"""At home in other libraries: nothing here is imported unless the app uses them."""
