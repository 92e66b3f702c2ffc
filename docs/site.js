// What the theme leaves out: wide tables that can be scrolled by keys, hidden inputs out of the tab
// order, and a name of its own for each navigation and for the search.
const repair = () => {
  const all = (selector) => document.querySelectorAll(selector)
  for (const table of all(".md-typeset__scrollwrap")) table.tabIndex = 0
  for (const input of all("input.md-option")) input.tabIndex = -1
  for (const nav of all("nav.md-code__nav")) nav.setAttribute("role", "none")
  for (const nav of all("nav.md-nav[aria-labelledby]")) {
    const name = nav.closest("li").querySelector(".md-ellipsis")
    nav.setAttribute("aria-label", name.textContent.trim())
    nav.removeAttribute("aria-labelledby")
  }
  for (const search of all(".md-search[role=dialog]")) search.setAttribute("aria-label", "Search")
}
new MutationObserver(repair).observe(document.body, { childList: true, subtree: true })
repair()
