// Keeps a page of workflows up to date while it is open, and asks before it acts.
(function () {
    "use strict";

    var live = document.getElementById("durable-live");
    var dialog = document.getElementById("durable-dialog");
    var notice = document.getElementById("durable-notice");
    var LONGEST_PAUSE = 30;
    var failures = 0;
    var timer = null;
    var shown = {};
    var pressed = false;

    function say(text, kind) {
        notice.className = "durable-notice" + (text ? " durable-notice-" + kind : "");
        notice.textContent = text;
    }

    function refreshing(text, isError) {
        var status = document.getElementById("durable-refresh");
        status.hidden = !text;
        status.querySelector(".status-dot").className = "status-dot " + (isError ? "status-dot-error" : "status-dot-live");
        document.getElementById("durable-refresh-text").textContent = text;
    }

    function plan() {
        window.clearTimeout(timer);
        timer = null;
        if (!live.dataset.over) {
            timer = window.setTimeout(look, 1000 * Math.min(live.dataset.pause * Math.pow(2, failures), LONGEST_PAUSE));
        }
    }

    function look() {
        if (document.hidden) {
            return plan();
        }
        var url = new URL(window.location.href);
        url.searchParams.set("shown", live.dataset.version);
        window.clearTimeout(timer);
        // Who isn't signed in any more is sent to another site, which a fetch may not follow.
        return fetch(url, {
            headers: {Accept: "application/json"},
            credentials: "same-origin",
            redirect: "manual"
        }).then(function (answer) {
            if (answer.type === "opaqueredirect" || answer.status === 401 || answer.status === 403) {
                return over("You aren't signed in any more: load this page again.");
            }
            if (answer.status === 404) {
                return over("This workflow isn't there any more: retention has removed it, or somebody has deleted it.");
            }
            return answer.json().then(function (news) {
                if (!answer.ok) {
                    throw new Error(news.message);
                }
                take(news);
            });
        }).catch(function (error) {
            failures += 1;
            refreshing("Not up to date", true);
            // A fetch that reaches nobody, and an answer that isn't ours, say nothing that a reader understands.
            var known = error instanceof TypeError || error instanceof SyntaxError ? "Flower doesn't answer." : error.message;
            say(known + " Trying again.", "trouble");
        }).then(plan);
    }

    function take(news) {
        if (failures) {
            failures = 0;
            say("", "");
        }
        if (pressed) {
            return; // A button that is replaced between press and release isn't clicked; the next answer has it all.
        }
        if (news.content !== null) {
            replace(new DOMParser().parseFromString(news.content, "text/html"));
        }
        live.dataset.version = news.version;
        live.dataset.over = news.over ? "yes" : "";
        refreshing(news.over ? "" : "Live", false);
    }

    function over(text) {
        live.dataset.over = "yes";
        refreshing("", false);
        say(text, "trouble");
        live.classList.add("durable-gone");
        live.querySelectorAll("button[data-action]").forEach(function (button) {
            button.disabled = true;
        });
    }

    // Only regions that have changed, so that what a reader has opened, scrolled or marked stays as it is.
    function replace(page) {
        page.querySelectorAll("[data-region]").forEach(function (region) {
            var name = region.dataset.region;
            var old = live.querySelector('[data-region="' + name + '"]');
            var text = region.innerHTML;
            if (old && shown[name] !== text) {
                keepOpen(old, region);
                var places = scrolled(old);
                old.replaceWith(region);
                Object.keys(places).forEach(function (key) {
                    region.querySelector('[data-scroll="' + key + '"]').scrollTop = places[key];
                });
            }
            shown[name] = text;
        });
    }

    function keepOpen(old, fresh) {
        var open = new Set(Array.from(old.querySelectorAll("details[open]"), function (each) {
            return each.dataset.key;
        }));
        fresh.querySelectorAll("details").forEach(function (each) {
            each.open = open.has(each.dataset.key);
        });
    }

    function scrolled(region) {
        var places = {};
        region.querySelectorAll("[data-scroll]").forEach(function (each) {
            places[each.dataset.scroll] = each.scrollTop;
        });
        return places;
    }

    var QUESTIONS = {
        cancel: ["Cancel this workflow?", "It ends as CANCELLED at once. A step that runs may still record its outcome; no next one starts."],
        resume: ["Resume this workflow?", "It goes on where it ended. Steps that have succeeded don't run again; failed ones run anew."],
        fork: ["Fork this workflow?", "A new workflow with the same arguments starts from its beginning. This one stays as it is."]
    };
    var VERBS = {cancel: "Cancel the workflow", resume: "Resume the workflow", fork: "Start the fork"};

    function ask(button) {
        var action = button.dataset.action;
        var step = button.dataset.step;
        var children = document.getElementById("durable-children");
        document.getElementById("durable-question").textContent =
            step === undefined ? QUESTIONS[action][0] : "Fork from the step " + step + "?";
        document.getElementById("durable-consequence").textContent = step === undefined ? QUESTIONS[action][1] :
            "A new workflow with the same arguments starts, with what this one had completed before this step.";
        document.getElementById("durable-yes").textContent = VERBS[action];
        children.hidden = action !== "cancel";
        children.querySelector("input").checked = false;
        dialog.returnValue = "";
        dialog.onclose = function () {
            if (dialog.returnValue === "yes") {
                act(action, step, children.querySelector("input").checked);
            }
        };
        dialog.showModal();
    }

    function act(action, step, children) {
        var said = new URLSearchParams({id: live.dataset.workflow});
        if (step !== undefined) {
            said.set("step", step);
        }
        if (children) {
            said.set("children", "yes");
        }
        fetch(live.dataset.steer.replace("ACTION", action), {
            method: "POST",
            body: said,
            headers: {"X-XSRFToken": cookie("_xsrf")},
            credentials: "same-origin"
        }).then(function (answer) {
            return answer.text().then(function (text) {
                if (!answer.ok) {
                    throw new Error(text || "Flower has refused this (" + answer.status + ").");
                }
                return JSON.parse(text);
            });
        }).then(function (done) {
            if (done.url) {
                window.location.assign(done.url);
                return undefined;
            }
            say(done.message, "done");
            live.dataset.over = "";
            return look();
        }).catch(function (error) {
            say(error instanceof TypeError ? "Flower doesn't answer: nothing is known of what was asked for." : error.message, "trouble");
        });
    }

    function cookie(name) {
        var found = document.cookie.split("; ").find(function (each) {
            return each.startsWith(name + "=");
        });
        return found ? decodeURIComponent(found.slice(name.length + 1)) : "";
    }

    // A lane of the picture leads to its step, which is opened.
    function openTarget() {
        var target = document.getElementById(window.location.hash.slice(1));
        if (target && target.tagName === "DETAILS") {
            target.open = true;
            target.scrollIntoView({block: "center"});
        }
    }

    if (!live) {
        return;
    }
    live.querySelectorAll("[data-region]").forEach(function (region) {
        shown[region.dataset.region] = region.innerHTML;
    });
    document.addEventListener("pointerdown", function () {
        pressed = true;
    });
    ["pointerup", "pointercancel", "blur"].forEach(function (end) {
        window.addEventListener(end, function () {
            pressed = false;
        });
    });
    openTarget();
    window.addEventListener("hashchange", openTarget);
    if (!live.dataset.over) {
        refreshing("Live", false);
    }
    plan();
    document.addEventListener("visibilitychange", function () {
        if (!document.hidden && !live.dataset.over) {
            look();
        }
    });
    if (dialog) {
        live.addEventListener("click", function (event) {
            var button = event.target.closest("button[data-action]");
            if (button) {
                ask(button);
            }
        });
    }
}());
